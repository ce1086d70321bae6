"""`fac export`: kept samples as data sets that other programs load, and on the hub."""
