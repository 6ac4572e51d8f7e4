"""Experiments of several trainings, as plain functions; finished parts are kept in folders and not done again."""
