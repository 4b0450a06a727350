"""Runs and findings to HTML pages and pictures."""
