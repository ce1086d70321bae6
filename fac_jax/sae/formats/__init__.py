"""SAEs of other programs: where they lie, what form they have, and how they are read and written."""
