"""The decisions of any mixture-of-experts model, Shunter's or transformers': read, recorded, forced, replayed."""
