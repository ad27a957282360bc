"""Evaluations: functions of a model and prepared data that return plain dicts of numbers."""
