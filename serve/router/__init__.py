"""``matgptq route``: several replicas behind one address, by an HAProxy whose configuration is written from what they hold."""
