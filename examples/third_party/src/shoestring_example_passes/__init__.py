"""Passes that shoestring finds through entry points."""
