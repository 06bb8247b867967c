"""VTP: prune a vision transformer, and actually run it faster."""
