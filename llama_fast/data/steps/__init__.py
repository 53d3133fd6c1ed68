"""What is done to documents: plain functions `Document -> Document | Removed`, and the one adapter that datatrove runs them by."""
