"""Wrong input drawn by Hypothesis. `tests/test_fuzz.py` runs fifty cases, `--hypothesis-profile=nightly` five hundred of each kind."""
