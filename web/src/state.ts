/** What the views share: the selection, the statistic, the open tensor. Views listen and draw themselves anew. */
import { coloursOf, type Colours } from './colour'
import type { Model } from './model'
import { SelectorError } from './selector/errors'
import { type Mask, Table } from './selector/table'
import { type Statistic, statisticsOf, together } from './statistics'

type Change = 'selection' | 'statistic' | 'theme' | 'tensor' | 'data' | 'step'

export class State {
  readonly table: Table
  readonly statistics: Statistic[]
  statistic: Statistic
  log = true
  /** Whether colours run over each role by itself. */
  perRole = false
  /** Whether colours run over all steps, so that a colour means the same at each. */
  allSteps = true
  selector = ''
  /** Which rows are selected; null for all. */
  mask: Mask | null = null
  selected: number
  error: SelectorError | null = null
  open: number | null = null
  #listeners: ((change: Change) => void)[] = []
  #colours: Colours | null = null

  constructor(readonly model: Model) {
    this.table = new Table(model)
    this.statistics = statisticsOf(model)
    this.statistic = this.statistics[0]
    this.log = this.statistic.scale === 'log'
    this.selected = model.size
  }

  listen(listener: (change: Change) => void): void {
    this.#listeners.push(listener)
  }

  emit(change: Change): void {
    // Colours over all steps stay as they are from step to step.
    if (change !== 'tensor' && !(change === 'step' && this.allSteps)) this.#colours = null
    for (const listener of this.#listeners) listener(change)
  }

  select(text: string): void {
    this.selector = text
    this.error = null
    if (!text.trim()) {
      this.mask = null
      this.selected = this.model.size
    } else {
      try {
        this.mask = this.table.select(text)
        this.selected = this.mask.reduce((sum, hit) => sum + hit, 0)
      } catch (error) {
        if (!(error instanceof SelectorError)) throw error
        this.error = error
      }
    }
    this.emit('selection')
  }

  choose(key: string): void {
    const found = this.statistics.find((statistic) => statistic.key === key)
    if (!found) return
    this.statistic = found
    this.log = found.scale === 'log'
    this.emit('statistic')
  }

  show(row: number | null): void {
    this.open = row
    this.emit('tensor')
  }

  /** Shows another step of a training, by its place. */
  go(at: number): void {
    const { over } = this.model
    if (!over) return
    over.at = Math.max(0, Math.min(over.steps.length - 1, Math.round(at)))
    this.emit('step')
  }

  hit(row: number): boolean {
    return this.mask === null || this.mask[row] === 1
  }

  /** The colours of the statistic over the cells of all stacks. */
  get colours(): Colours {
    this.#colours ??= coloursOf(this.statistic, this.log, this.#cells())
    return this.#colours
  }

  *#cells(): Generator<number> {
    const { statistic, model } = this
    const { over } = model
    const steps = over && this.allSteps && statistic.group === 'steps' ? over.steps.length : 0
    const shown = steps ? Array.from({ length: steps }, (_, at) => ({ ...statistic, value: (row: number) => over!.value(statistic.key, row, at) })) : [statistic]
    for (const each of shown) for (const stack of model.stacks) for (const rows of stack.cells.values()) yield together(each, rows, model.numel)
  }
}
