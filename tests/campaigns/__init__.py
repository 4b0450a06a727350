"""Campaigns of faults against runs: kills, power losses, full disks, damage, NaN, wrong settings.

`python -m tests.campaigns` runs them at their full sizes, `test_campaigns.py` at small ones. Each prints what it
injected and, for a failure, the call that repeats it.
"""
