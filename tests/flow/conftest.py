from hypothesis import settings

# Correctness only: on a busy machine a time limit per example fails for no reason of ours.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
