"""The library that the notebooks build up to, and import. One module per concept; see README.md for the map."""
