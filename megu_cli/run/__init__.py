"""The run directory and the files in it: artifacts, the log, remembered digests, what belongs to megu."""
