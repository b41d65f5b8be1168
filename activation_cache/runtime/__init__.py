"""What any process needs: errors for users, progress, versions, and exchange with its siblings.

It imports no other room.
"""
