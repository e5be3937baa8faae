"""What every part of the package uses: rows of numbers, checks of arguments, random state, BatchNorm, repr."""
