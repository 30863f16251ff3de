"""The rewriting engine, and the verification of whatever was written anew."""
