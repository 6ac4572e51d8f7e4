"""Sections as data, written as text, HTML and JSON; reads folders only."""
