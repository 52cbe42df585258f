"""Attacks: how test victims are made. One file per attack; :mod:`unbackdoor.attacks.poisoning` plants them all."""
