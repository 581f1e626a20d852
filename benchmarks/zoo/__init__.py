"""The models of ``zoo_sweep.py``, and how one of them is judged."""
