// The library hides its symbols, except the functions that the control module calls.
#pragma once

#define SPO_EXPORT __attribute__((visibility("default")))
