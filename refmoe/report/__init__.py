"""Findings as text, HTML, JSON and JUnit XML."""
