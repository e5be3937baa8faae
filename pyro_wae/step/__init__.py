"""One step: its records, the program it runs, prior samples, what is observed, and how it is compared."""
