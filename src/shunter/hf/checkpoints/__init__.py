"""Models on disk: read, checked, made sparse, exported. Nothing here trusts a folder, and no code in one is run."""
