"""Labelled images of any kind of location, as image sets: what tasks are made of."""
