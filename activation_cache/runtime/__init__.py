"""What any process needs: errors for users, progress, versions, and messages between processes.

It knows nothing of models or files, and imports no other room.
"""
