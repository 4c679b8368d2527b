"""What to run, as classes of knobs to read and inherit from; Fiddle lives here only."""
