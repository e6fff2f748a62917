"""The parts of amalgamate.py: how modules of a package become sections of one file."""
