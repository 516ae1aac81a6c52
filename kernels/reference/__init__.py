"""Slow, obvious fp32 code that judges the fast paths. Shares no arithmetic with them."""
