"""Load tests: the service beside its peers, in one run, on one machine, with one set of payloads."""
