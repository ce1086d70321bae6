"""Which relevant features a data set exercises, which it misses, and which existing documents would fill the gap."""
