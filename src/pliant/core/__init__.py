"""The one idea: Site, Decision, Trace, record, bind, masked, errors. Imports nothing of ours."""
