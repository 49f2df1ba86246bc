"""What every stage shares: error sentences, command-line habits, progress, safe files, HTML reports. Imports nothing of ours."""
