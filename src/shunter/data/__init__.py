"""What is trained on and looked at: documents with labels, and the windows that are cut of them, before any model."""
