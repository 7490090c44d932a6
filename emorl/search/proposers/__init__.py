"""Proposers: functions of the finished trials to the next candidates."""
