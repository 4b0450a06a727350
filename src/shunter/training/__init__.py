"""Training: the loop of a recipe, and the balance of experts in any Trainer."""
