/** The numbers of a training over its steps, and the step that the page shows. */
import { type History, type Numbers, unpack } from './payload'

/** Step and value. */
export type Point = [number, number]

export class Steps {
  readonly steps: Numbers
  readonly keys: string[]
  /** Place of the step that is shown. */
  at: number
  #known = new Map<string, Numbers>()

  constructor(
    readonly form: History,
    readonly size: number,
  ) {
    this.steps = unpack(form.steps)
    this.keys = Object.keys(form.columns)
    this.at = Math.max(this.steps.length - 1, 0)
  }

  /** The step that is shown. */
  get step(): number {
    return this.steps.length ? this.steps[this.at] : NaN
  }

  value(key: string, row: number, at = this.at): number {
    let found = this.#known.get(key)
    if (!found) this.#known.set(key, (found = unpack(this.form.columns[key])))
    return found[at * this.size + row]
  }

  /** The values of a tensor at the steps that have one. */
  curve(key: string, row: number): Point[] {
    const found: Point[] = []
    this.steps.forEach((step, at) => {
      const value = this.value(key, row, at)
      if (!Number.isNaN(value)) found.push([step, value])
    })
    return found
  }

  /** Place of a step, or of the next one that was recorded: its weights are read then. */
  placeOf(step: number): number {
    let [low, high] = [0, Math.max(this.steps.length - 1, 0)]
    while (low < high) {
      const middle = (low + high) >> 1
      if (this.steps[middle] < step) low = middle + 1
      else high = middle
    }
    return low
  }

  /** Place of the step that is nearest to a number. */
  nearest(step: number): number {
    const at = this.placeOf(step)
    return at > 0 && step - this.steps[at - 1] < this.steps[at] - step ? at - 1 : at
  }
}
