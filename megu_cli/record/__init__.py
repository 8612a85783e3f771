"""Proof of a deletion: the record of a run, the ledger of requests, and the search for images that came back."""
