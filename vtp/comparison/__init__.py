"""Comparisons of runtimes side by side: what `vtp bench` and the scripts of `bench/` measure with."""
