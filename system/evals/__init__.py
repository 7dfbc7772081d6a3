"""Evaluation: which held-out questions are asked, what each answer was, and what they come to."""
