"""
The world that the policy walks in: robots, episodes, two simulators, and the processes they run in.

    robots       body, camera and step of each data set;  poses and headings
    episodes     read and verify R2R, RxR and our own episodes
    houses       generate houses and walks in them
    house_sim    the simulator of these houses (numpy);  habitat_sim: habitat-sim, same methods
    worker       one simulator as a command: requests on stdin, answers on stdout
    pool         many of them, locally or through ssh, docker, srun
    check        is this machine ready?

Imports cli and reward only. episodes, house_sim, habitat_sim, worker and robots are also loaded
by the simulator's interpreter: Python 3.9, numpy and pillow.
"""


class SimError(Exception):
    """The episode or its scene is at fault; the message names the file. The simulator goes on."""


class SimDied(Exception):
    """A simulator's process died or hung. The message names it and its request."""
