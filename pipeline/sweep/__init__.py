"""What a sweep searches, what a trial is, and what comes out. pipeline/stages/sweep.py is the stage."""
