"""What every part of the package uses: numerics, checks of arguments, random state, BatchNorm, repr."""
