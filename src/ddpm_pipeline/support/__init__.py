"""What every room uses: random draws, pictures, files, errors. Imports nothing of the package."""
