"""One step: its records, the program it runs, prior draws, what is observed, and how it is compared."""
