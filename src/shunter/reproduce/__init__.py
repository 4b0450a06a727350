"""The review's figures, tables and numbers, computed: each with the paper's value, ours, and a verdict."""
