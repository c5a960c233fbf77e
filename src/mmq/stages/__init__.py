"""The stages, and the frame that checks, resumes and completes them; they don't import each other."""
