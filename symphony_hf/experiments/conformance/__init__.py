"""The matrix of family x behaviour: every MoE family of the installed transformers, built tiny and put to the test."""
