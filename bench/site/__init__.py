"""The site of the documentation, and the reference pages that are made from the code."""
