"""Instruments that put a claim and windows of text before a judge: detection, fuzzing, intruder, simulation."""
