// How far two processors are from each other.
#pragma once

namespace sec {

double round_trip();                                // nanoseconds, median

}  // namespace sec
