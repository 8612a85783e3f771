"""Other methods, one short file each, to set MeGU beside."""
