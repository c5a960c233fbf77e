"""The result held against its source: byte by byte, formula by formula, and by what it says of text."""
