"""The command `region-chat`: one question, a conversation, or a batch file."""
